"""The recipes: one published system a file, found by its module name."""
