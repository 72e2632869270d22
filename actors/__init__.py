"""The processes of a run: how they are placed, wired and watched. The only package that imports Ray."""
