//! Registers metrics, and remembers what was registered. It never knows what any of them counts.

use std::{cell::RefCell, collections::HashMap};

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
    core::{Collector, MetricVec, MetricVecBuilder},
    exponential_buckets,
};

/// What a metric is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it says.
    pub help: &'static str,
    /// Its labels.
    pub labels: Vec<&'static str>,
}

/// A vector of series of any kind.
pub(super) trait Forget: Send + Sync {
    /// Removes the series with this value of `model`. Who holds one may go on counting; nobody sees it.
    fn forget(&self, model: &str);
}

impl<T: MetricVecBuilder> Forget for MetricVec<T> {
    fn forget(&self, model: &str) {
        for family in self.collect() {
            for series in family.get_metric() {
                let labels: HashMap<&str, &str> =
                    series.get_label().iter().map(|label| (label.name(), label.value())).collect();
                if labels.get("model") == Some(&model) {
                    // Only this function removes any.
                    let _ = self.remove(&labels);
                }
            }
        }
    }
}

/// Takes metrics into a registry.
#[derive(Default)]
pub(super) struct Registrar {
    pub(super) registry: Registry,
    pub(super) catalogue: RefCell<Vec<Described>>,
    /// All that have the label `model`.
    pub(super) by_model: RefCell<Vec<Box<dyn Forget>>>,
}

/// Upper ends of a histogram of seconds, from 10 µs to 80 s.
fn seconds_buckets() -> Vec<f64> {
    exponential_buckets(0.000_01, 2.5, 18).expect("constant buckets")
}

/// Upper ends of a histogram of items, from 1 to 1,024.
fn items_buckets() -> Vec<f64> {
    exponential_buckets(1.0, 2.0, 11).expect("constant buckets")
}

impl Registrar {
    fn describe(&self, name: &'static str, kind: &'static str, help: &'static str, labels: &[&'static str]) {
        self.catalogue.borrow_mut().push(Described { name, kind, help, labels: labels.to_vec() });
    }

    fn register(&self, metric: impl Collector + 'static) {
        self.registry.register(Box::new(metric)).expect("names are unique");
    }

    fn register_series<T: MetricVecBuilder + 'static>(&self, series: &MetricVec<T>, labels: &[&'static str])
    where
        MetricVec<T>: Collector,
    {
        self.register(series.clone());
        if labels.contains(&"model") {
            self.by_model.borrow_mut().push(Box::new(series.clone()));
        }
    }

    pub(super) fn counters(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[&'static str],
    ) -> IntCounterVec {
        self.describe(name, "counter", help, labels);
        let series = IntCounterVec::new(Opts::new(name, help), labels).expect("constant names");
        self.register_series(&series, labels);
        series
    }

    pub(super) fn gauges(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[&'static str],
    ) -> IntGaugeVec {
        self.describe(name, "gauge", help, labels);
        let series = IntGaugeVec::new(Opts::new(name, help), labels).expect("constant names");
        self.register_series(&series, labels);
        series
    }

    /// Histograms of seconds.
    pub(super) fn seconds(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[&'static str],
    ) -> HistogramVec {
        self.histograms(name, help, labels, seconds_buckets())
    }

    /// Histograms of items.
    pub(super) fn items(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[&'static str],
    ) -> HistogramVec {
        self.histograms(name, help, labels, items_buckets())
    }

    fn histograms(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[&'static str],
        buckets: Vec<f64>,
    ) -> HistogramVec {
        self.describe(name, "histogram", help, labels);
        let options = HistogramOpts::new(name, help).buckets(buckets);
        let series = HistogramVec::new(options, labels).expect("constant names");
        self.register_series(&series, labels);
        series
    }

    pub(super) fn counter(&self, name: &'static str, help: &'static str, _: &[&'static str]) -> IntCounter {
        self.counters(name, help, &[]).with_label_values::<&str>(&[])
    }

    pub(super) fn gauge(&self, name: &'static str, help: &'static str, _: &[&'static str]) -> IntGauge {
        self.gauges(name, help, &[]).with_label_values::<&str>(&[])
    }

    /// One histogram of seconds.
    pub(super) fn second(&self, name: &'static str, help: &'static str, _: &[&'static str]) -> Histogram {
        self.seconds(name, help, &[]).with_label_values::<&str>(&[])
    }

    /// One histogram of items.
    pub(super) fn item(&self, name: &'static str, help: &'static str, _: &[&'static str]) -> Histogram {
        self.items(name, help, &[]).with_label_values::<&str>(&[])
    }

    /// A gauge of bytes, which may be more than an integer of it holds exactly.
    pub(super) fn bytes(&self, name: &'static str, help: &'static str, labels: &[&'static str]) -> Gauge {
        self.describe(name, "gauge", help, labels);
        let gauge = Gauge::new(name, help).expect("constant names");
        self.register(gauge.clone());
        gauge
    }
}

/// Declares metrics as the fields of a struct: `field: kind("name", "help", ["label"]);`, where the kind is a method of [`Registrar`].
macro_rules! families {
    (
        $(#[$about:meta])*
        $vis:vis struct $name:ident {
            $( $(#[$doc:meta])* $field:ident: $kind:ident($metric:literal, $help:literal, [$($label:literal),*]); )*
        }
    ) => {
        $(#[$about])*
        $vis struct $name {
            $( $(#[$doc])* $vis $field: $crate::insight::metrics::registrar::families!(@type $kind), )*
        }

        impl $name {
            /// Registers all of them.
            pub(in $crate::insight::metrics) fn new(registrar: &$crate::insight::metrics::registrar::Registrar) -> Self {
                Self { $( $field: registrar.$kind($metric, $help, &[$($label),*]), )* }
            }
        }
    };
    (@type counters) => { ::prometheus::IntCounterVec };
    (@type counter) => { ::prometheus::IntCounter };
    (@type gauges) => { ::prometheus::IntGaugeVec };
    (@type gauge) => { ::prometheus::IntGauge };
    (@type seconds) => { ::prometheus::HistogramVec };
    (@type items) => { ::prometheus::HistogramVec };
    (@type second) => { ::prometheus::Histogram };
    (@type item) => { ::prometheus::Histogram };
    (@type bytes) => { ::prometheus::Gauge };
}
pub(super) use families;
