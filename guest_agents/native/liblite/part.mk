# The library for C programs; included by ../Makefile.
LIBLITE = liblite data control json

all: build/liblite.so

build/liblite.so: $(LIBLITE:%=build/liblite/%.o)
	$(CC) -shared -Wl,-z,now -Wl,-soname,liblite.so -o $@ $^ -lpthread

build/liblite/%.o: liblite/%.c $(wildcard liblite/*.h) lite/wire.h Makefile liblite/part.mk
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -c $< -o $@
