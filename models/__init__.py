"""The bundled tiny model and the code that makes it."""
