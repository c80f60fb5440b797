"""Ids that name nobody: hashes keyed with a secret, so that only who holds it can tell whose they are."""

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from cmcgns.errors import UserError

LEAST_BYTES = 16
DIGITS = 20
"""Hexadecimal digits of a pseudonym: 80 bits, no two alike among a billion."""


@dataclass(frozen=True)
class Pseudonyms:
    """Replaces ids; without a key it leaves them as they are."""

    key: bytes | None = None

    @classmethod
    def from_file(cls, path: str | None) -> "Pseudonyms":
        """The pseudonyms of the key in the file at ``path``; ids as they are where it is None."""
        if path is None:
            return cls()
        try:
            key = Path(path).expanduser().read_bytes().strip()
        except OSError as error:
            raise UserError(f"prepare.pseudonymise_key_file {path}: {error.strerror}") from None
        if len(key) < LEAST_BYTES:
            raise UserError(
                f"prepare.pseudonymise_key_file {path} holds {len(key)} bytes; at least {LEAST_BYTES} are needed, "
                "for instance from: openssl rand -hex 32"
            )
        return cls(key)

    def __call__(self, identity: str) -> str:
        """What stands for ``identity``: the same for the same id and key everywhere."""
        return identity if self.key is None else self._digest(identity)[:DIGITS]

    @property
    def fingerprint(self) -> str | None:
        """Tells keys apart without giving them away; None without one."""
        return None if self.key is None else self._digest("fingerprint of the key")[:8]

    def _digest(self, text: str) -> str:
        assert self.key is not None
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()
