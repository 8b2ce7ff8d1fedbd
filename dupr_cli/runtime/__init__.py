"""What every long-running stage needs: outputs, loading, state, stopping, devices, processes."""
