"""The beginning of scripts that may use the code beside the weights only."""

# refuses the installed package
WITHOUT_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "vila" or name.startswith("vila."):
            raise ImportError("the package must not be needed")

sys.meta_path.insert(0, Refuse())
"""

WARNINGS_ARE_ERRORS = """
import warnings
warnings.simplefilter("error", UserWarning)
"""
