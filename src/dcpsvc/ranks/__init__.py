"""How ranks find each other: arrivals on the c10d store, an all_gather, or a gather, on a group of our own."""
