"""Models: where they come from, how they are loaded, and where their decoder blocks are."""
