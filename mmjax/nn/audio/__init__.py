"""Audio towers."""
