"""Selection rules: how many of a token's experts are taken."""
