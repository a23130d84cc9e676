"""The names and formulas of TLlib that fastda replaces; like the other packages of this folder, for where it is not
installed."""

__version__ = "stand-in"
