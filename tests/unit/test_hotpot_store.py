"""The key-value store on Hotpot: against a dict, by one program and by many on several blades at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import lite_pair
from tests.unit.hotpot_rack import PROJECT, Blade, output, rack, shells

pytestmark = pytest.mark.skipif(lite_pair.missing() is not None, reason=str(lite_pair.missing()))
Rack = dict[str, Blade]
STORE = "from guest_agents.hotpot.apps.store import Store\n"


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory, lite_core: Path) -> Iterator[Rack]:
    with rack(tmp_path_factory.mktemp("store"), lite_core, "gm0", "mb0", "mb1", "mb2") as made:
        yield made


def test_a_store_is_there_for_all_and_after_all_have_closed_it(blades: Rack) -> None:
    with shells(blades["mb0"], blades["mb1"]) as (one, other):
        one.do(f"{STORE}s = Store.create(session, 'people', 1 << 20, replicas=2)")
        one.do("s.put(b'ada', b'mathematics')\ns.put(b'grace', b'compilers')\ns.put(b'barbara', b'languages')")
        other.do(f"{STORE}s = Store.open(session, 'people', replicas=2)")
        assert other.do("s.get(b'ada'), s.read(b'grace'), s.get(b'nobody')") == (b"mathematics", b"compilers", None)
        assert other.do("s.scan(b'b', 5)") == [(b"barbara", b"languages"), (b"grace", b"compilers")]
        assert other.do("s.delete(b'ada'), s.delete(b'ada')") == (True, False)
        assert one.do("s.get(b'ada'), s.scan(b'', 1)") == (None, [(b"barbara", b"languages")])
        one.do("s.close()")
        other.do("s.close()")
        assert one.do("session.datasets()[0]['open']") == []
        other.do("s = Store.open(session, 'people')")
        assert other.do("s.scan(b'', 5)") == [(b"barbara", b"languages"), (b"grace", b"compilers")]
        other.do("s.close()")
        other.do("session.delete('people')")


def test_a_store_from_a_shell(blades: Rack) -> None:
    def tell(blade: str, lines: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "guest_agents.hotpot.apps.store", "shell", "--mib", "1", "--replicas", "2"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT,
            env={**os.environ, "RACKLESS_HOTPOT": str(blades[blade].socket)})  # fmt: skip
        out, errors = process.communicate(lines, timeout=60)
        return out + "".join(errors.splitlines()[-1:])

    assert tell("mb0", "put ada first programmer\nput grace compilers\nget ada\n") == "first programmer\n"
    assert tell("mb1", "scan a 9\ndelete ada\nget ada\n") == "ada first programmer\ngrace compilers\n-\n"
    assert "BadArgument: forget?" in tell("mb2", "forget ada\n")
    blades["mb0"].run("session.delete('shell')")


RANDOM = f"""{STORE}
import random
name, seed, count, mode, buckets = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
rand, model = random.Random(seed), dict()
def order(key, value):
    return value[:2]
with Store.create(session, name, 4 << 20, mode=mode, buckets=buckets, replicas=2, order=order) as store:
    for turn in range(count):
        key = b"%d" % int(rand.paretovariate(0.3)) if rand.random() < 0.2 else rand.randbytes(rand.randint(1, 200))
        if rand.random() < 0.4 and model:
            key = rand.choice(sorted(model))
        if rand.random() < 0.3:
            assert store.delete(key) == (model.pop(key, None) is not None)
        else:
            value = rand.randbytes(int(rand.paretovariate(0.5)) % 3800)
            old = store.modify(key[:255], lambda old: value)
            assert old == model.get(key[:255])
            model[key[:255]] = value
        if turn % 50 == 49:
            store.close()
            store = Store.open(session, name, replicas=2, order=order)
        some = rand.choice(sorted(model)) if model else key
        assert store.get(some) == store.read(some) == model.get(some)
        start = (rand.randbytes(1), rand.randbytes(1))
        after = sorted((order(k, v), k) for k, v in model.items() if (order(k, v), k) >= start)
        assert store.scan(start[1], 7, start[0]) == [(k, model[k]) for _, k in after[:7]]
    assert sorted(store.scan(b"", len(model) + 1)) == sorted(model.items())
    print(len(model))
"""


@pytest.mark.long
@pytest.mark.parametrize("buckets", [1, 40])
def test_it_does_what_a_dict_does(blades: Rack, buckets: int) -> None:
    name = f"random {buckets}"
    assert int(blades["mb1"].run(RANDOM, name, buckets, 300, "mrmw", buckets)) > 50
    blades["mb0"].run("session.delete(sys.argv[1])", name)


WRITER = f"""{STORE}
import random
name, me, count, replicas = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rand = random.Random(me)
def order(key, value):
    return value[-1:]
store = Store.open(session, name, replicas=replicas, order=order)
for turn in range(count):
    key = b"key %d" % (rand.paretovariate(1) * 3 % 40)
    new = None if rand.random() < 0.3 else b"%d.%d " % (me, turn) + b"x" * rand.randrange(1000) + rand.randbytes(1)
    old = store.modify(key, lambda old: new)
    print(key.decode(), *("-" if v is None else v.split()[0].decode() for v in (old, new)), flush=True)
store.close()
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["mrmw", "mrsw"])
def test_many_programs_on_many_blades_change_the_same_keys(blades: Rack, mode: str) -> None:
    """Each update must have found what exactly one other left, and both indexes must tell the same at the end."""
    blades["mb0"].run(f"{STORE}Store.create(session, {mode!r}, 2 << 20, mode={mode!r}, buckets=8).close()")
    where = ["mb0", "mb0", "mb1", "mb2"]
    running = [blades[name].start(WRITER, mode, i, 60, 1 + i % 3) for i, name in enumerate(where)]
    steps = [line.split() for program in running for line in output(program).splitlines()]
    assert len(steps) == 60 * len(where)
    at_end = f"""{STORE}
store = Store.open(session, {mode!r}, order=lambda key, value: value[-1:])
found = store.scan(b"", 1000)
assert [(v[-1:], k) for k, v in found] == sorted((v[-1:], k) for k, v in found)
assert all(store.get(k) == store.read(k) == v for k, v in found)
present = [k for k in (b"key %d" % i for i in range(40)) if store.get(k) is not None]
assert sorted(k for k, _ in found) == sorted(present)
for key, value in found:
    print(key.decode(), value.split()[0].decode())
"""
    ends = {blade.run(at_end) for blade in blades.values()}
    assert len(ends) == 1, "blades do not see the same"
    last = dict(line.rsplit(" ", 1) for line in ends.pop().splitlines())
    for key in {" ".join(step[:2]) for step in steps}:
        found = Counter(old for one, two, old, _ in steps if f"{one} {two}" == key)
        left = Counter(new for one, two, _, new in steps if f"{one} {two}" == key)
        assert left + Counter(["-"]) == found + Counter([last.get(key, "-")]), key
    blades["mb0"].run("session.delete(sys.argv[1])", mode)


MOVER = f"""{STORE}
import random
me, rand, store = int(sys.argv[2]), random.Random(sys.argv[2]), Store.open(session, sys.argv[1])
for turn in range(120):
    if rand.random() < 0.5:
        store.put(b"stay %02d" % rand.randrange(20), b"x" * rand.randrange(3000))
    else:
        store.modify(b"come and go %d" % rand.randrange(300), lambda old: b"y" * 60 if old is None else None)
print("done")
"""
WATCHER = f"""{STORE}
import select
store, expected, turns = Store.open(session, sys.argv[1]), [b"stay %02d" % i for i in range(20)], 0
print("ready", flush=True)
while not select.select([0], [], [], 0)[0]:
    missing = [key for key in expected if store.get(key) is None]
    assert not missing, (turns, missing)
    found = [key for key, _ in store.scan(b"", 1000)]
    assert found == sorted(set(found)), (turns, found)
    assert found[-20:] == expected, (turns, found[-20:])
    turns += 1
print(turns)
"""


@pytest.mark.long
def test_records_that_move_are_never_missing(blades: Rack) -> None:
    """Buckets overflow and leaves split while a blade without writers looks on, by plain loads."""
    blades["mb0"].run(f"""{STORE}
with Store.create(session, "watched", 4 << 20, buckets=4) as store:
    for i in range(20):
        store.put(b"stay %02d" % i, b"")""")
    watcher = blades["gm0"].start(WATCHER, "watched")
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "ready\n"
    movers = [blades[name].start(MOVER, "watched", i) for i, name in enumerate(("mb0", "mb1", "mb1", "mb2"))]
    for mover in movers:
        assert output(mover) == "done\n"
    out, errors = watcher.communicate("stop", timeout=60)
    assert watcher.returncode == 0, errors
    assert int(out) > 5
    blades["mb0"].run("session.delete('watched')")


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(blades: Rack) -> None:
    with shells(blades["mb0"]) as (one,):
        one.do(f"{STORE}s = Store.create(session, 'small', 8 * 4096, buckets=1)")
        assert one.refused("s.put(b'k' * 256, b'')").startswith("BadArgument")
        assert one.refused("s.put(b'', b'')").startswith("BadArgument")
        assert one.refused("s.put(b'k', bytes(4096))").startswith("BadArgument")
        one.do("for i in range(5): s.put(b'%d' % i, bytes(3000))")
        assert one.refused("s.put(b'x', bytes(3000))").startswith("NoSpace")
        assert one.do("s.get(b'x'), [key for key, _ in s.scan(b'', 9)]") == (None, [b"%d" % i for i in range(5)])
        one.do("s.put(b'3', b'')\ns.put(b'x', bytes(900))\ns.close()")
        one.do("session.create('other', 4096).close()")
        assert one.refused("Store.open(session, 'other')").startswith("BadArgument")
        assert one.refused("Store.create(session, 'tiny', 8192)").startswith("BadArgument")
        one.do("session.delete('small')\nsession.delete('other')")
