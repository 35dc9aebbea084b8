"""The Loraplex server: HTTP in front of one engine that serves many adapters."""
