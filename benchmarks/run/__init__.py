"""How cases run: processes of their own, a check, then times; and what they run on."""
