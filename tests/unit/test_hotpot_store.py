"""The key-value store on Hotpot: against a dict, by one program and by many on several blades at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import lite_pair
from tests.unit.hotpot_rack import Blade, output, rack, shells

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


RANDOM = f"""{STORE}
import json, random
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
