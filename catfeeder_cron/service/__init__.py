"""The daemon as a service: its start and stop, its signals, its status for systemd, its metrics and health pages."""
