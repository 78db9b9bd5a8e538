"""What a run is worth, against the toybox's own geometry."""
