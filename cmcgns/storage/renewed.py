"""A file system for those who keep it longer than credentials last, as Ray Train does."""

from collections.abc import Callable
from typing import Any

from pyarrow import fs as arrow_fs


class Renewed(arrow_fs.FileSystemHandler):
    """Passes each request to the file system that ``current`` returns."""

    def __init__(self, current: Callable[[], arrow_fs.FileSystem]) -> None:
        self.current = current

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Renewed) and self.current == other.current

    def __hash__(self) -> int:
        return hash(self.current)

    def get_type_name(self) -> str:
        return "renewed"

    def normalize_path(self, path: str) -> str:
        return self.current().normalize_path(path)

    def get_file_info(self, paths: list[str]) -> Any:
        return self.current().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.current().get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.current().create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.current().delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.current().delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self.current().delete_dir_contents("/", accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self.current().delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.current().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.current().copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self.current().open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self.current().open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self.current().open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.current().open_append_stream(path, metadata=metadata)
