"""The same work for Loraplex and its peers, measured in one run."""
