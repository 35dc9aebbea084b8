"""Where adapters come from: each module brings one kind of source into a folder."""
