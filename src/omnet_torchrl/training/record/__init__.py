"""What a run leaves behind: its folder, checkpoints, metrics, trackers and pictures, and what it prints."""
