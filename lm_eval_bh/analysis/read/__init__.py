"""From files to experiments: finds, reads and checks what runs have written."""
