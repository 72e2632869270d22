"""Weaver's wire protocol over HTTP. Operations, files and actors are others'."""
