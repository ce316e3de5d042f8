"""Files of other projects, turned into observations."""
