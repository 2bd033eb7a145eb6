"""Expressions of crontab(5), over whole years against a walk through every minute."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catfeeder_cron.schedule.crontab import Crontab

MINUTE = timedelta(minutes=1)
EPOCH = datetime(1970, 1, 1)

PARIS = ZoneInfo("Europe/Paris")
NEW_YORK = ZoneInfo("America/New_York")

MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
WEEKDAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def firings(expression: str, zone: ZoneInfo, first_day: str, days: int) -> list[str]:
    """List the firings of some days from noon (UTC) on, on the clocks of the zone."""
    crontab = Crontab.parse(expression)
    slot = utc(f"{first_day}T12:00")
    until = slot + timedelta(days=days)
    local = []
    while (slot := crontab.next_after(slot, zone)) <= until:
        local.append(slot.astimezone(zone).strftime("%d %H:%M %z"))
    return local


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("5 4 * * *", "2026-01-02T04:05"),
        ("30 12 * * *", "2026-01-01T12:30"),
        ("0 12 * * *", "2026-01-02T12:00"),
        ("*/25 * * * *", "2026-01-01T12:25"),
        ("7-59/20 * * * *", "2026-01-01T12:07"),
        ("3,1,2 * * * *", "2026-01-01T12:01"),
        pytest.param("0 0 29 2 *", "2028-02-29T00:00", id="leap day"),
        pytest.param("0 0 29 2 */7", "2032-02-29T00:00", id="leap day that is a Sunday"),
        ("0 0 31 4,5 *", "2026-05-31T00:00"),
        (" 15\t3  *  * \t mon-fri ", "2026-01-02T03:15"),
        ("0 0 * JUN-Aug,dec Sun", "2026-06-07T00:00"),
        ("0 0 * * 0", "2026-01-04T00:00"),
        ("0 0 * * 7", "2026-01-04T00:00"),
        ("0 0 * * 1", "2026-01-05T00:00"),
        ("0 0 * * 5-7", "2026-01-02T00:00"),
        ("0 0 * * sat-7", "2026-01-03T00:00"),
        ("0 0 * * */90", "2026-01-04T00:00"),
        ("0 0 2-31 * */2", "2026-01-03T00:00"),
        ("@hourly", "2026-01-01T13:00"),
        ("@daily", "2026-01-02T00:00"),
        ("@midnight", "2026-01-02T00:00"),
        ("@weekly", "2026-01-04T00:00"),
        ("@monthly", "2026-02-01T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        (" @annually ", "2027-01-01T00:00"),
    ],
)
def test_an_expression_fires_when_crontab_5_says(expression: str, expected: str) -> None:
    thursday_noon = utc("2026-01-01T12:00")
    assert Crontab.parse(expression).next_after(thursday_noon, ZoneInfo("UTC")) == utc(expected)


@pytest.mark.parametrize(
    ("expression", "days"),
    [
        ("0 0 13 * fri", [2, 9, 13, 16, 23, 30]),
        ("0 0 13 * *", [13]),
        ("0 0 * * fri", [2, 9, 16, 23, 30]),
        ("0 0 */10 * fri", []),  # begins with `*`, so it is no alternative: the 1st, 11th, 21st and a Friday
        ("0 0 1,2,13-16 * */5", [2, 16]),  # Sundays and Fridays
        ("0 0 1-31/10 * fri", [1, 2, 9, 11, 16, 21, 23, 30, 31]),
    ],
)
def test_day_of_month_and_weekday_are_alternatives_unless_one_begins_with_a_star(
    expression: str, days: list[int]
) -> None:
    january = firings(expression, ZoneInfo("UTC"), "2025-12-31", 31)
    assert [int(text[:2]) for text in january] == days


@pytest.mark.parametrize(
    ("expression", "field", "found"),
    [
        ("60 * * * *", "minute", "'60'"),
        ("0 24 * * *", "hour", "'24'"),
        ("0 0 0 * *", "day-of-month", "'0'"),
        ("0 0 * 13 *", "month", "'13'"),
        ("0 0 * * 8", "weekday", "'8'"),
        ("0 0 * * monday", "weekday", "'monday'"),
        ("0 0 * mon *", "month", "'mon'"),
        ("jan 0 * * *", "minute", "'jan'"),
        ("*/0 * * * *", "minute", "'*/0'"),
        ("5/15 * * * *", "minute", "'5/15'"),
        ("30-10 * * * *", "minute", "'30-10'"),
        ("0 0 * * sat-sun", "weekday", "'sat-sun'"),
        ("1,,2 * * * *", "minute", "''"),
        ("*-5 * * * *", "minute", "'*-5'"),
        ("-5 * * * *", "minute", "'-5'"),
        ("+5 * * * *", "minute", "'+5'"),
        ("5- * * * *", "minute", "'5-'"),
        ("1.5 * * * *", "minute", "'1.5'"),
        ("0 0 L * *", "day-of-month", "'L'"),
        ("0 0 ? * *", "day-of-month", "'?'"),
        ("0 0 * * 5#2", "weekday", "'5#2'"),
        ("٣ * * * *", "minute", "'٣'"),
        ("0 0 30 2 *", "day-of-month", "'30'"),
        ("0 0 31 apr,jun */2", "day-of-month", "'31'"),
        ("* * * *", "minute, hour, day-of-month, month, weekday", "'* * * *'"),
        ("0 * * * * *", "five fields", "'0 * * * * *'"),
        ("", "five fields", "''"),
        ("@reboot", "@hourly", "'@reboot'"),
        ("@dayly", "@hourly", "'@dayly'"),
        ("@daily 5", "@hourly", "'@daily 5'"),
    ],
)
def test_what_cron_would_refuse_is_refused_in_one_line_that_names_it(expression: str, field: str, found: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        Crontab.parse(expression)
    message = str(refusal.value)
    assert field in message
    assert found in message
    assert "\n" not in message


def test_a_day_that_its_month_lacks_is_no_fault_beside_a_weekday() -> None:
    assert firings("0 0 30 2 mon", ZoneInfo("UTC"), "2026-01-31", 28) == [
        f"{day:02} 00:00 +0000" for day in (2, 9, 16, 23)
    ]


def test_the_text_of_an_expression_is_kept_with_single_spaces() -> None:
    assert Crontab.parse(" 15\t3  * * mon-fri").expression == "15 3 * * mon-fri"
    assert Crontab.parse("@daily").expression == "@daily"


def test_a_fixed_time_in_the_skipped_hour_fires_once_right_after_the_gap() -> None:
    after_the_gap = ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]
    assert firings("30 2 * * *", PARIS, "2026-03-27", 3) == after_the_gap


def test_several_fixed_times_in_the_skipped_hour_fire_once() -> None:
    assert firings("0,20,40 2 * * *", PARIS, "2026-03-28", 1) == ["29 03:00 +0200"]


def test_the_minute_after_the_gap_fires_once_when_it_matches_too() -> None:
    assert firings("30 1-3 * * *", PARIS, "2026-03-28", 1) == [
        "29 01:30 +0100",
        "29 03:00 +0200",
        "29 03:30 +0200",
    ]
    assert firings("0 2,3 * * *", PARIS, "2026-03-28", 1) == ["29 03:00 +0200"]


def test_the_day_of_a_skipped_time_must_match() -> None:
    assert firings("30 2 * * mon-sat", PARIS, "2026-03-28", 1) == []
    assert firings("30 2 29 3 *", PARIS, "2026-03-28", 1) == ["29 03:00 +0200"]


def test_a_fixed_time_in_the_repeated_hour_fires_in_its_first_pass_alone() -> None:
    assert firings("30 2 * * *", PARIS, "2026-10-24", 2) == ["25 02:30 +0200", "26 02:30 +0100"]
    assert firings("0 2,3 * * *", PARIS, "2026-10-24", 1) == ["25 02:00 +0200", "25 03:00 +0100"]


def test_a_fixed_time_does_not_fire_for_whoever_asks_in_the_second_pass() -> None:
    crontab = Crontab.parse("30 1 * * *")
    second_pass = utc("2026-11-01T06:10")  # 01:10 EST
    assert crontab.next_after(second_pass, NEW_YORK) == utc("2026-11-02T06:30")


@pytest.mark.parametrize("expression", ["*/30 * * * *", "0,30 * * * *", "*/30 0-4 * * *", "0,30 */1 * * *"])
def test_a_star_in_minute_or_hour_follows_elapsed_time(expression: str) -> None:
    spring = [text for text in firings(expression, PARIS, "2026-03-28", 1) if "29 01" <= text < "29 04"]
    autumn = [text for text in firings(expression, PARIS, "2026-10-24", 1) if "25 02" <= text < "25 03"]
    assert spring == ["29 01:00 +0100", "29 01:30 +0100", "29 03:00 +0200", "29 03:30 +0200"]
    assert autumn == ["25 02:00 +0200", "25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100"]


def test_half_an_hour_of_daylight_saving_time() -> None:
    lord_howe = ZoneInfo("Australia/Lord_Howe")
    assert firings("15 2 * * *", lord_howe, "2026-10-03", 1) == ["04 02:30 +1100"]
    assert firings("45 1 * * *", lord_howe, "2026-04-04", 1) == ["05 01:45 +1100"]


def test_a_skipped_midnight() -> None:
    cairo, sao_paulo = ZoneInfo("Africa/Cairo"), ZoneInfo("America/Sao_Paulo")
    assert firings("@daily", cairo, "2026-04-23", 2) == ["24 01:00 +0300", "25 00:00 +0300"]
    assert firings("30 0 * * sun", sao_paulo, "2017-10-14", 2) == ["15 01:00 -0200"]


def test_an_hour_before_midnight_that_is_repeated_on_the_day_before() -> None:
    sao_paulo = ZoneInfo("America/Sao_Paulo")
    assert firings("30 23 * * *", sao_paulo, "2017-02-18", 1) == ["18 23:30 -0200"]
    assert firings("0 0 * * *", sao_paulo, "2017-02-18", 1) == ["19 00:00 -0300"]


def test_a_day_skipped_at_the_date_line_is_not_made_up_for() -> None:
    apia = ZoneInfo("Pacific/Apia")
    assert firings("0 6 * * *", apia, "2011-12-29", 2) == ["29 06:00 -1000", "31 06:00 +1400"]
    assert firings("0 6 30 * *", apia, "2011-12-28", 3) == []


@dataclass(frozen=True)
class Field:
    """A generated field: its text and the numbers it stands for."""

    text: str
    numbers: frozenset[int]


def numbers(low: int, high: int, names: list[str]) -> st.SearchStrategy[Field]:
    def spell(number: int) -> st.SearchStrategy[str]:
        spellings = [str(number), f"{number:02}"]
        if low <= number < low + len(names):
            spellings += [names[number - low], names[number - low].upper()]
        return st.sampled_from(spellings)

    @st.composite
    def item(draw: st.DrawFn) -> Field:
        first = draw(st.integers(low, high))
        last = draw(st.integers(first, high))
        step = draw(st.integers(1, high))
        one, span = draw(spell(first)), f"{draw(spell(first))}-{draw(spell(last))}"
        return draw(
            st.sampled_from(
                [
                    Field(one, frozenset([first])),
                    Field(span, frozenset(n for n in range(low, high + 1) if first <= n <= last)),
                    Field(
                        f"{span}/{step}",
                        frozenset(n for n in range(first, last + 1) if (n - first) % step == 0),
                    ),
                    Field(f"*/{step}", frozenset(n for n in range(low, high + 1) if (n - low) % step == 0)),
                ]
            )
        )

    def enumeration(items: list[Field]) -> Field:
        return Field(",".join(i.text for i in items), frozenset().union(*(i.numbers for i in items)))

    everything = st.just(Field("*", frozenset(range(low, high + 1))))
    return everything | st.lists(item(), min_size=1, max_size=3).map(enumeration)


FIELDS = st.tuples(
    numbers(0, 59, []),
    numbers(0, 23, []) | st.integers(0, 3).map(lambda hour: Field(str(hour), frozenset([hour]))),
    numbers(1, 31, []),
    numbers(1, 12, MONTHS),
    numbers(0, 7, WEEKDAYS),
)


def fixed(*texts: str) -> tuple[Field, ...]:
    return tuple(
        Field(text, frozenset(range(60)) if text == "*" else frozenset(map(int, text.split(",")))) for text in texts
    )


class YearOfMinutes:
    """A year in a zone, walked through from minute to minute: which times on the clock each minute serves."""

    def __init__(self, zone: ZoneInfo, year: int) -> None:
        self.first = datetime(year, 1, 1)
        self.end = datetime(year + 1, 1, 1)
        self.changes: list[datetime] = []
        self.stretches = list(self._stretches(zone))
        self.due: dict[int, int] = {}  # wall clock: the instant when a fixed time of day is served
        instants, offset = self.stretches[0]
        latest = previous = instants[0] + offset - 1
        for instants, offset in self.stretches:
            first, last = instants[0] + offset, instants[-1] + offset
            if first != previous + 1:
                self.changes.append(EPOCH + instants[0] * MINUTE)
                if abs(first - previous - 1) > 180:
                    latest = first - 1
            self.due.update(dict.fromkeys(range(latest + 1, first), instants[0]))
            new = max(first, latest + 1)
            self.due.update(zip(range(new, last + 1), range(new - offset, last + 1 - offset), strict=True))
            latest = max(latest, last)
            previous = last

    def _stretches(self, zone: ZoneInfo) -> Iterator[tuple[range, int]]:
        """List the stretches of minutes that have one offset, and that offset."""
        start, end = (self.first - EPOCH) // MINUTE - 2 * 24 * 60, (self.end - EPOCH) // MINUTE + 1
        offset = self._offset(zone, start)
        for quarter in range(start, end, 15):
            for instant in (quarter, quarter + 1):  # when offsets change, whatever the zone
                if instant < end and (new := self._offset(zone, instant)) != offset:
                    yield range(start, instant), offset
                    start, offset = instant, new
        yield range(start, end), offset

    def shown(self, wall: int) -> list[int]:
        """List the instants at which the clock shows this."""
        return [wall - offset for instants, offset in self.stretches if wall - offset in instants]

    @staticmethod
    def _offset(zone: ZoneInfo, instant: int) -> int:
        local = datetime.fromtimestamp(instant * 60, zone)
        return (local.replace(tzinfo=None) - EPOCH) // MINUTE - instant

    def windows(self, fields: tuple[Field, ...]) -> list[tuple[datetime, datetime]]:
        """The whole year, or for an expression of many firings a day and more on each side of a change."""
        if len(fields[0].numbers) * len(fields[1].numbers) <= 6:
            return [(self.first, self.end)]
        margin = timedelta(hours=30)
        return [(max(c - margin, self.first), min(c + margin, self.end)) for c in self.changes]

    def firings(self, fields: tuple[Field, ...], after: datetime, until: datetime) -> list[datetime]:
        minute, hour, day_of_month, month, weekday = fields
        elapsed = minute.text[0] == "*" or hour.text[0] == "*"
        both = day_of_month.text[0] == "*" or weekday.text[0] == "*"
        found: set[int] = set()
        day = after.date() - timedelta(days=2)
        while (day := day + timedelta(days=1)) <= until.date() + timedelta(days=1):
            by_day = day.day in day_of_month.numbers
            by_weekday = day.isoweekday() in weekday.numbers or day.isoweekday() % 7 in weekday.numbers
            wanted = by_day and by_weekday if both else by_day or by_weekday
            if not wanted or day.month not in month.numbers:
                continue
            midnight = (datetime(day.year, day.month, day.day) - EPOCH) // MINUTE
            for wall in (midnight + 60 * h + m for h in hour.numbers for m in minute.numbers):
                if elapsed:
                    found.update(self.shown(wall))
                elif wall in self.due:
                    found.add(self.due[wall])
        instants = (EPOCH + instant * MINUTE for instant in sorted(found))
        return [instant for instant in instants if after < instant <= until]


def is_possible(fields: tuple[Field, ...]) -> bool:
    try:
        Crontab.parse(" ".join(field.text for field in fields))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("zone_name", "year"),
    [
        ("Europe/Paris", 2026),
        ("Australia/Lord_Howe", 2026),  # by half an hour
        ("America/Sao_Paulo", 2017),  # at midnight
        ("Pacific/Apia", 2011),  # a whole day
        *(
            pytest.param(zone_name, year, marks=pytest.mark.proof)  # three seconds each
            for zone_name, year in (
                ("UTC", 2026),
                ("America/New_York", 2024),
                ("Asia/Kathmandu", 1986),
                ("Africa/Cairo", 2026),
                ("America/St_Johns", 2010),
            )
        ),
    ],
)
def test_over_a_whole_year_it_fires_as_a_walk_through_every_minute_does(zone_name: str, year: int) -> None:
    zone = ZoneInfo(zone_name)
    walk = YearOfMinutes(zone, year)

    @settings(max_examples=6)
    @given(FIELDS.filter(is_possible))
    @example(fixed("30", "2", "*", "*", "*"))
    @example(fixed("0,30", "0,1,2", "*", "*", "*"))
    @example(fixed("1", "0,23", "*", "*", "0,6"))
    @example(fixed("*", "*", "*", "*", "*"))
    def fires_as_the_walk_does(fields: tuple[Field, ...]) -> None:
        crontab = Crontab.parse(" ".join(field.text for field in fields))
        for after, until in walk.windows(fields):
            expected = walk.firings(fields, after, until)
            fired = []
            slot = after.replace(tzinfo=UTC)
            while (slot := crontab.next_after(slot, zone)) <= until.replace(tzinfo=UTC):
                fired.append(slot.replace(tzinfo=None))
            assert fired == expected
            counted = crontab.count(after.replace(tzinfo=UTC), until.replace(tzinfo=UTC), zone)
            assert counted == len(expected)

    fires_as_the_walk_does()


@given(FIELDS.filter(is_possible), st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)), st.data())
def test_whoever_asks_before_a_firing_is_told_of_it(
    fields: tuple[Field, ...], instant: datetime, data: st.DataObject
) -> None:
    crontab = Crontab.parse(" ".join(field.text for field in fields))
    asked = instant.replace(tzinfo=UTC)
    slot = crontab.next_after(asked, PARIS)
    assert slot > asked
    assert slot.second == slot.microsecond == 0
    assert slot.tzinfo is UTC
    between = data.draw(st.datetimes(instant, slot.replace(tzinfo=None) - timedelta(microseconds=1)))
    assert crontab.next_after(between.replace(tzinfo=UTC), PARIS) == slot


@given(st.text(alphabet="0123456789*/-,monsujbed \t@#?L", max_size=25))
def test_any_text_is_read_or_refused_with_a_value_error(text: str) -> None:
    try:
        crontab = Crontab.parse(text)
    except ValueError:
        return
    assert crontab.next_after(utc("2026-01-01"), PARIS) > utc("2026-01-01")
