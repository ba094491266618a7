"""Fixtures of the layer's checks. Stands alone: these tests run without the packages that aoscore needs."""
