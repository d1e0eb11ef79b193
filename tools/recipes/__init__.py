"""Reading training recipes of other projects, for tools/import_recipe.py: one file for each project."""
