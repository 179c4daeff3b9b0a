# The original, by the benchmark of its own manual: AnyEvent::Fork->new->run ("CORE::exit"), wait for EOF.
#   perl anyevent_fork.pl new|new_exec INFLIGHT SECONDS COUNT [PAUSE]
# With a pause between the starts: the time of each to its first byte, from a print in the worker.
use strict;
use warnings;
use Time::HiRes ();

my ($method, $inflight, $seconds, $count, $pause) = @ARGV;

unless (eval { require EV; require AnyEvent; require AnyEvent::Fork; 1 }) {
    print qq[{"skip": "not installed (Debian: libanyevent-fork-perl libev-perl)"}\n];
    exit 0;
}

sub cpu { Time::HiRes::clock_gettime (Time::HiRes::CLOCK_PROCESS_CPUTIME_ID ()) }

# One start; $done is called at EOF.
sub start {
    my ($done) = @_;

    AnyEvent::Fork->$method->run ("CORE::exit", sub {
        my ($fh) = @_;
        my $watcher; $watcher = AE::io ($fh, 0, sub {
            defined (my $got = sysread $fh, my $buf, 1)
                or return;
            die "the child sent something\n" if $got;
            undef $watcher;
            close $fh;
            $done->();
        });
    });
}

# The first start makes the template: its time is told apart.
my $begin = Time::HiRes::time ();
my $first = AE::cv ();
start (sub { $first->send });
$first->recv;
my $first_ms = (Time::HiRes::time () - $begin) * 1e3;

if ($pause) {
    my $template = AnyEvent::Fork->new->eval (q[sub first { syswrite $_[0], "x" }]);
    my @us;
    $begin = Time::HiRes::time ();
    my $until = $begin + $seconds;
    while ($count ? @us < $count : Time::HiRes::time () < $until) {
        my $cv = AE::cv ();
        my $timer = AE::timer ($pause, 0, sub { $cv->send });
        $cv->recv;
        my $asked = Time::HiRes::time ();
        my $done = AE::cv ();
        $template->fork->run ("main::first", sub {
            my ($fh) = @_;
            my $watcher; $watcher = AE::io ($fh, 0, sub {
                defined (my $got = sysread $fh, my $buf, 1)
                    or return;
                die "the child ended without its byte\n" unless $got;
                undef $watcher;
                close $fh;
                $done->send;
            });
        });
        $done->recv;
        push @us, (Time::HiRes::time () - $asked) * 1e6;
    }
    printf qq[{"n": %d, "seconds": %.6f, "us": [%s]}\n],
        scalar @us, Time::HiRes::time () - $begin, join ",", map { sprintf "%.1f", $_ } @us;
    exit 0;
}

my ($n, $running, $all) = (0, 0, AE::cv ());
my $cpu = cpu ();
$begin = Time::HiRes::time ();
my $until = $begin + $seconds;

my $lane; $lane = sub {
    if ($count ? $n >= $count : Time::HiRes::time () >= $until) {
        $all->send unless $running;
        return;
    }
    ++$n; ++$running;
    start (sub { --$running; $lane->() });
};
$lane->() for 1 .. $inflight;
$all->recv;

printf qq[{"n": %d, "seconds": %.6f, "cpu_us": %.3f, "first_ms": %.3f, "versions": {"perl": "%vd", "AnyEvent::Fork": "%s"}}\n],
    $n, Time::HiRes::time () - $begin, (cpu () - $cpu) * 1e6 / ($n || 1), $first_ms, $^V, $AnyEvent::Fork::VERSION;
