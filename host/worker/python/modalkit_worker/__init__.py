"""The worker of Python pipelines: runs batches that a host sends it over a socket, on the interpreter's main thread.

`frames` moves them, `items` says what is in them, `code` finds the user's modules, `pipelines` makes of what it finds there something that runs
batches, `output` brings what is printed and logged to the host, and `serving` does one after the other. Nothing but the standard library is
imported, and pydantic where the pipeline uses it.
"""
