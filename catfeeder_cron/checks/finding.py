"""What a check has found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    message: str

    def as_json(self) -> dict[str, str]:
        return {"level": self.level, "subject": self.subject, "message": self.message}
