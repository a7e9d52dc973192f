"""The command line `sparsesam`: `app` puts together one module a group of commands."""
