"""Files: prompt lists, pictures, tables and figures."""
