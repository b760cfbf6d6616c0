"""What the machine gives: memory and time, each as one budget that long calls are held to."""
