"""The library's logger, whose lines are in the host's log."""

import logging

LOGGER = logging.getLogger("modalkit")
