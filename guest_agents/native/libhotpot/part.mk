# Hotpot's library for C programs; included by ../Makefile. It must speak the protocol of the service beside it.
HP_PROTOCOL := $(shell sed -n 's/^SETTINGS = {"protocol": \([0-9]*\),.*/\1/p' ../hotpot/records.py)

all: build/libhotpot.so

build/libhotpot.so: build/libhotpot/hotpot.o build/libhotpot/watch.o build/liblite/json.o
	$(CC) -shared -Wl,-z,now -Wl,-soname,libhotpot.so -o $@ $^ -lpthread

build/libhotpot/%.o: libhotpot/%.c $(wildcard libhotpot/*.h) liblite/json.h ../hotpot/records.py Makefile \
                      libhotpot/part.mk
	@mkdir -p $(@D)
	$(CC) $(ALL_CFLAGS) -DHP_PROTOCOL=$(HP_PROTOCOL) -c $< -o $@
