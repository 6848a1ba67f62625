"""Where rows come from, and whether they can be used."""
