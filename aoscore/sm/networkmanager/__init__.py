"""Network manager: a network of its own for every instance, as CM allocated it."""
