"""Finds the user's modules in the private copy of their folder, as if they lay in the folder itself: `__file__` and tracebacks name the user's own
files, and an edit while the worker runs changes nothing of it."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

SUFFIXES = importlib.machinery.EXTENSION_SUFFIXES


class Folder(importlib.abc.MetaPathFinder):
    """Modules of one folder."""

    def __init__(self, folder, copy):
        self.folder, self.copy = folder, copy

    def find_spec(self, name, path=None, target=None):
        if path is None:
            below = ""
        else:
            places = [(place, root) for place in path for root in (self.folder, self.copy)]
            inside = [(place, root) for place, root in places if place == root or place.startswith(root + os.sep)]
            if not inside:
                return None
            below = os.path.relpath(*inside[0])
        place = os.path.normpath(os.path.join(below, name.rpartition(".")[2]))
        return self._package(name, place) or self._module(name, place)

    def _package(self, name, place):
        init = os.path.join(place, "__init__.py")
        if not os.path.isfile(os.path.join(self.copy, init)):
            return None
        return self._source(name, init, [os.path.join(self.folder, place)])

    def _module(self, name, place):
        if os.path.isfile(os.path.join(self.copy, place + ".py")):
            return self._source(name, place + ".py", None)
        for suffix in SUFFIXES:
            extension = os.path.join(self.copy, place + suffix)
            if os.path.isfile(extension):
                loader = importlib.machinery.ExtensionFileLoader(name, extension)
                return importlib.util.spec_from_file_location(name, extension, loader=loader)
        return None

    def _source(self, name, place, locations):
        loader = Source(name, os.path.join(self.folder, place), os.path.join(self.copy, place))
        return importlib.util.spec_from_file_location(
            name, loader.path, loader=loader, submodule_search_locations=locations
        )


class Source(importlib.machinery.SourceFileLoader):
    """A module that says it is the user's file, and is read from the copy."""

    def __init__(self, name, path, copy):
        super().__init__(name, path)
        self.copy = copy

    def get_data(self, path):
        return super().get_data(self.copy if path == self.path else path)

    def get_code(self, fullname):
        # Compiled files beside the user's may be of another edit.
        return self.source_to_code(self.get_data(self.path), self.path)


copy_of_folder = ""


def use(folder, copy, shim):
    """Has imports look into the copy first, then into the shim, then where they looked before; never into the folder itself, where what nobody has
    looked at may lie by now."""
    global copy_of_folder
    copy_of_folder = copy
    folder = folder.rstrip(os.sep) or os.sep
    standard = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path.insert(standard, Folder(folder, copy))
    # For folders without an `__init__.py`, which are packages of what lies in them.
    sys.path[:0] = [copy, shim] if shim else [copy]
    enter(folder)


# The working directory as it was named, and as it was found.
_entered = {}


def enter(folder):
    """Makes a folder the working directory."""
    os.chdir(folder)
    _entered.update(folder=folder, found=os.getcwd())


def enter_again():
    """The same: behind a link there may be another folder by now. Code that has gone elsewhere stays there."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = _entered["found"]
    if here == _entered["found"]:
        enter(_entered["folder"])


def is_users(module):
    """Whether a module that was imported is the user's own."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), Source)


def has(module):
    """Whether the user's folder has a module of this name: a folder of data, or something installed, is none."""
    place = os.path.join(copy_of_folder, module)
    return os.path.isfile(place + ".py") or os.path.isfile(os.path.join(place, "__init__.py"))
