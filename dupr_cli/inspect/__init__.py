"""Pictures of what pre-training does: view pairs with their patches, and a run's curves."""
