"""The expert store on disk: layout, writer, reader."""

from offload_moe.store.in_place import open_view
from offload_moe.store.manifest import DenseEntry, Layer
from offload_moe.store.store import Piece, Record, Store, is_store

Store.open_view = staticmethod(open_view)

__all__ = ["DenseEntry", "Layer", "Piece", "Record", "Store", "is_store"]
