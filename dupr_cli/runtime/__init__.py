"""Services for all long-running stages: outputs, loading, state, stopping, devices, processes."""
