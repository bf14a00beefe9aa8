"""Files and folders that are there whole or not at all, what may be replaced, space, locks, and files behind a URL.

What the system refuses becomes a :class:`~merganser.errors.FileError`, which says how to mend it.
"""

from merganser.files.atomic import (
    new_file,
    new_folder,
    remove_leftovers,
    remove_leftovers_in,
    staging_folder,
    sync,
    write_bytes,
    write_text,
    writing,
)
from merganser.files.claims import lasting_scratch, remove, remove_dead_scratch, scratch_folder
from merganser.files.locks import locked
from merganser.files.overwriting import Output, Refusal, files_below, is_within, other_kind, real_files, unlisted
from merganser.files.remote import RemoteFolder, is_url, local_path
from merganser.files.space import free_bytes, human_bytes, parse_size, space_error
from merganser.files.uploads import RemoteCheck, Staging, new_remote_folder, settle

__all__ = [
    "Output",
    "Refusal",
    "RemoteCheck",
    "RemoteFolder",
    "Staging",
    "files_below",
    "free_bytes",
    "human_bytes",
    "is_url",
    "is_within",
    "lasting_scratch",
    "local_path",
    "locked",
    "new_file",
    "new_folder",
    "new_remote_folder",
    "other_kind",
    "parse_size",
    "real_files",
    "remove",
    "remove_dead_scratch",
    "remove_leftovers",
    "remove_leftovers_in",
    "scratch_folder",
    "settle",
    "space_error",
    "staging_folder",
    "sync",
    "unlisted",
    "write_bytes",
    "write_text",
    "writing",
]
