"""What the device computed becomes what users read."""
