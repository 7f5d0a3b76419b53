"""Studies: ``python -m memorization.studies.<name>``, each a table and a picture."""
