"""The daemon as a service: its life, its signals, its status, and who may ask for it."""
