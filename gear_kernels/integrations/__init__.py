"""The operators inside other people's trainers: a file for each, which imports that trainer alone, and `common` under them."""
