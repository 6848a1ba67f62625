"""What text a row becomes, and which parts of it are learned."""
