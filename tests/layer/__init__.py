"""Checks of the Yocto layer and the kas files, in an environment of their own: `make layer`."""
