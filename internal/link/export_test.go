package link

// DriverCounters is for the external tests.
var DriverCounters = driverCounters
