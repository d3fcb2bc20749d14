"""What is experimental of `modal`."""


def stop_fetching_inputs():
    """Ends a container there. Here an exception that says `CUDA error` has the host replace the process."""
