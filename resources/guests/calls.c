/* Calls that a debugger can follow. */

struct pair {
    long number;
    long square;
};

static struct pair last;

__attribute__((noinline)) static long square(long number)
{
    struct pair pair = { number, number * number };

    last = pair;
    return pair.square;
}

__attribute__((noinline)) static long add(long sum, long number)
{
    long more = square(number);

    return sum + more;
}

long sum_of_squares(long count)
{
    long sum = 0;

    for (long number = 1; number <= count; number++)
        sum = add(sum, number);
    return sum;
}
