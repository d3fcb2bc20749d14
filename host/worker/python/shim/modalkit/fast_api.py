"""The web application, which is the host."""


def create_app(*args, **settings):
    """The host serves."""
    return None
