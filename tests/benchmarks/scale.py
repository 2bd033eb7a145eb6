"""How large the tables are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Rows in the tables on which rates are measured, and in the small and the large one of those that are compared."""

    rows: int

    @property
    def small(self) -> int:
        return self.rows // 20

    @property
    def large(self) -> int:
        return self.rows * 5 // 2
