"""Real programs whose output tells whether their memory was right, with working sets of some 8 to 16 MiB.

Each is a shell command, run in a folder that has `english.txt` (1 MiB of a dictionary), `small.txt` (the first quarter
of it) and the files of SCRIPTS. `$RUN` stands before the program that is meant: nothing, or `split run ... --`. What is
printed must not depend on time, place or the order of threads: it is compared byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT_BYTES = 1 << 20
TEXT, SMALL = "english.txt", "small.txt"


@dataclass(frozen=True)
class RealProgram:
    """A command, and what is special about it: shown beside its figures."""

    name: str
    command: str
    what: str
    mebibytes: float
    """Its working set: most memory with contents that its busiest process has at a time, as its pager counts it."""


WORDS_AWK = """\
{ $0 = tolower($0); gsub(/[^a-z]+/, " "); for (i = 1; i < NF; i++) count[$i " " $(i + 1)]++ }
END { for (pair in count) print count[pair], pair | "sort" }
"""

DICT_PY = """\
import hashlib, json, re
text = open("english.txt").read(60_000).lower()
seen, follow, before = {}, {}, ""
for match in re.finditer("[a-z]+", text):
    word = match.group()
    seen[word] = text[max(match.start() - 900, 0) : match.end() + 900]
    follow.setdefault(before[:2], {}).setdefault(word, []).append(match.start())
    before = word
for word in sorted(seen)[::3]:
    del seen[word]
digest = hashlib.sha256()
for table in (seen, follow):
    for key in sorted(table):
        digest.update(json.dumps([key, table[key]], sort_keys=True).encode())
print(len(seen), len(follow), digest.hexdigest())
"""

MATRIX_PY = """\
import hashlib, os
os.environ["OPENBLAS_NUM_THREADS"] = "2"
import numpy
random = numpy.random.default_rng(1)
a = random.integers(-9, 9, (160, 160)).astype(float)
b = random.integers(-9, 9, (160, 160)).astype(float)
assert (numpy.rint(a @ b) == a.astype(int) @ b.astype(int)).all()
x = random.permutation(100_000)
order = numpy.argsort(x, kind="stable")
assert (x[order] == numpy.arange(100_000)).all()
pieces = [numpy.sort(x.reshape(100, 1000), axis=1), numpy.cumsum(x), numpy.unique(x % 77777), (a @ b).astype(int)]
for piece in pieces:
    print(hashlib.sha256(piece.tobytes()).hexdigest())
"""

TABLES_SQL = """\
create table words(line int, word text, length int);
with recursive n(i, x) as
  (select 1, 7 union all select i + 1, (x * 1103515245 + 12345) % 2147483648 from n where i < 5200)
insert into words select i, printf('%08x-%0160d', x, x * 17 % 65521), x % 97 from n;
create index by_word on words(word); create index by_length on words(length, word);
update words set length = length + 1 where line % 3 = 0; delete from words where line % 7 = 0;
select length, count(*), min(word), max(word) from words group by length order by length;
select a.word from words a join words b on a.length = b.line and b.length < 30 order by a.word limit 200;
pragma integrity_check;
"""

REDIS_SH = """\
# A server filled with known keys, a benchmark in another of its databases, a snapshot by a forked child, a reload.
port=6399
$RUN redis-server --port $port --save '' --enable-debug-command yes --dir "$PWD" --dbfilename dump.rdb --logfile '' \
    >redis.log 2>&1 &
ask() { redis-cli -p $port "$@"; }
until ask ping >/dev/null 2>&1; do sleep 0.2; done
awk 'BEGIN { for (i = 0; i < 3000; i++) { v = ""
       for (k = 0; k < 20; k++) v = v sprintf("%x", (i * 7919 + k * 104729) % 1048573)
       printf "SET key:%d %s:%s\\r\\n", i, i, v v v v; printf "HSET hash:%d f%d %s g %d\\r\\n", i % 300, i, v, i } }' |
    ask --pipe | tail -1
printf '%s\\n' dbsize 'debug digest' | ask
redis-benchmark -p $port --dbnum 1 -t set,get,lpush,lrange_100 -n 1500 -r 1000 -d 400 -c 8 -q >bench.txt 2>&1
tr '\\r' '\\n' <bench.txt | grep -c 'requests per second, p50'
printf '%s\\n' 'select 1' flushdb bgsave | ask
while ask info persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.2; done
ask info persistence | grep -o 'rdb_last_bgsave_status:[a-z]*'
printf '%s\\n' 'debug digest' 'debug reload' 'debug digest' 'shutdown nosave' | ask
wait
redis-check-rdb dump.rdb | grep -c 'RDB looks OK'
rm -f dump.rdb bench.txt
"""

UNIT_C = """\
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_DS_IMPLEMENTATION
#include <stb/stb_image_write.h>
#include <stb/stb_ds.h>
"""

SCRIPTS = {"words.awk": WORDS_AWK, "dict.py": DICT_PY, "matrix.py": MATRIX_PY, "tables.sql": TABLES_SQL,
           "redis.sh": REDIS_SH, "unit.c": UNIT_C}  # fmt: skip

THRICE = f"cat {TEXT} {TEXT} {TEXT}"
PROGRAMS = (
    RealProgram("gawk", f"LC_ALL=C $RUN gawk -f words.awk {SMALL} | sha256sum", "an array of word pairs", 7.8),
    RealProgram("sort", f"cat {TEXT} {TEXT} | LC_ALL=C $RUN sort -S 24M | sha256sum", "lines of text", 5),
    RealProgram("sqlite3", "$RUN sqlite3 :memory: <tables.sql", "tables and indexes in memory", 8.1),
    RealProgram("python3", "$RUN python3 dict.py", "dicts of words, texts and lists", 11),
    RealProgram("numpy", "$RUN python3 matrix.py", "arrays: products, sorts", 13),
    RealProgram("gcc", "$RUN gcc -O1 -w -c -o unit.o unit.c && sha256sum <unit.o", "compiles a part of stb", 17.5),
    RealProgram("pigz", f"{THRICE} | $RUN pigz -n -c -p 6 -b 1024 | sha256sum", "six threads", 4.9),
    RealProgram("redis", "sh redis.sh", "server, benchmark, snapshot by a forked child, reload", 5.6),
)
